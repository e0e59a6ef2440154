"""The pass library, installed as `sparc.passes`."""

if __name__ != "sparc.passes":
    raise ImportError("import this package as `sparc.passes`")
