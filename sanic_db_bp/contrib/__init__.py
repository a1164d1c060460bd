"""Optional parts, each imported by itself and behind an extra of its own where it needs one."""
