"""Three real models carried by PyPI packages, their data and their evaluation (sources and licences: README.md)."""
