"""The targets, installed as `sparc.codegen`."""

if __name__ != "sparc.codegen":
    raise ImportError("import this package as `sparc.codegen`")
