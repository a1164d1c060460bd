"""What stands between SQLAlchemy's engine and the driver: pool, COMMIT, and who does not answer."""
