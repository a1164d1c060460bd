"""The way of a request: what its handler wants, its units of work, and how they end."""
