"""The countries of ISO 3166 and their subdivisions, served by Sanic through `sanic_db_bp`."""
