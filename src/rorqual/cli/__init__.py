"""The commands of `rorqual`."""
