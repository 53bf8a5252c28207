"""qkpatch: edit the query-key product of a safetensors checkpoint, tensor by tensor.

The house has three rooms and a corridor between them:

* ``qkpatch.spectral``    the maths on tensors; knows no files;
* ``qkpatch.checkpoint``  files and the Hub; knows no algebra;
* ``cli`` and ``console`` the surface: parse, call, render;
* ``recipe -> plan -> patch -> manifest`` leads from one to the other, and ``verify`` back.

Imports run downwards only; ``tests/test_architecture.py`` draws the rules.
"""

from importlib.metadata import version

__version__ = version("qkpatch")
