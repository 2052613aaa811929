"""One file per published method: a new file here is a new pass."""
