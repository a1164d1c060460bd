"""This package beside what people write by hand and beside its peers, measured in one run."""
