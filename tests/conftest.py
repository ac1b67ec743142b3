"""Eight CPU devices for every test, set before JAX starts; and the same examples in every run.

`--hypothesis-profile=default` draws others.
"""

import os

import hypothesis

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")
