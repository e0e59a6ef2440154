"""The public test kit: what authors of encodings and passes check their work with, and wrong twins to check it."""

from sparc.testing.encoding_mutants import encoding_mutants
from sparc.testing.encodings import assert_encoding
from sparc.testing.passes import assert_mutants_caught, assert_pass, mutants

__all__ = ["assert_encoding", "assert_mutants_caught", "assert_pass", "encoding_mutants", "mutants"]
