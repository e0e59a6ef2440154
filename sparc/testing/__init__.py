"""The public test kit: what authors of encodings and passes check their work with, and wrong twins to check it."""

from sparc.testing.encoding_mutants import encoding_mutants
from sparc.testing.encodings import assert_encoding

__all__ = ["assert_encoding", "encoding_mutants"]
