"""What runs on a bare node: standard library only, Python 3.9 and newer."""
