"""Nothing here can be imported without Triton, which the extra `dev` brings on Linux alone."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
