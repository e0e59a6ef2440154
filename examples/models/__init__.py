"""Three real models carried by PyPI packages, their data and their evaluation. See README.md for sources and licences."""
