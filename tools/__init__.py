"""Tools for those who work on retnet; not part of the package."""
