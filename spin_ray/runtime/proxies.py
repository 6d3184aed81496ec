"""HTTP proxies of the environment (``http_proxy``, ``HTTPS_PROXY``, ``NO_PROXY``), which servers here need not.

A proxy that is asked for ``127.0.0.1`` asks its own machine, and reads the key that the request carries.
"""

import ipaddress
import os
import urllib.request
from typing import Any
from urllib.parse import urlsplit

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VARIABLES = ("no_proxy", "NO_PROXY")


def keep_loopback_from_proxies(*urls: str) -> None:
    """Adds the usual names of this machine, and the loopback hosts of ``urls``, to ``NO_PROXY`` of this process.

    Every HTTP client reads it, those of lm-eval, MLflow and object stores too, and so do the processes started later.
    """
    if not urllib.request.getproxies_environment():
        return
    left_out = ",".join(os.environ.get(name, "") for name in _VARIABLES)  # some clients read one, some the other
    names = [name.strip() for name in left_out.split(",") if name.strip()]
    if "*" in names:
        return
    hosts = [host for url in urls if (host := urlsplit(url).hostname) and is_loopback(host)]
    text = ",".join(dict.fromkeys([*names, *_LOOPBACK, *hosts]))
    os.environ.update(dict.fromkeys(_VARIABLES, text))


def is_loopback(host: str) -> bool:
    """Returns True for ``localhost``, ``127.0.0.0/8`` and ``::1``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".").lower() == "localhost"


def open_url(request: urllib.request.Request, timeout_s: float) -> Any:
    """Returns the answer as ``urlopen`` does. A server of this machine is asked without a proxy."""
    here = is_loopback(urlsplit(request.full_url).hostname or "")
    handlers = [urllib.request.ProxyHandler({})] if here else []
    return urllib.request.build_opener(*handlers).open(request, timeout=timeout_s)


def proxy_of(url: str) -> str | None:
    """Returns the proxy that a request to ``url`` goes through, without its credentials; None without one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy:
        return None
    scheme, colon, host = proxy.rpartition("://")  # both may be missing
    return f"{scheme}{colon}{host.rpartition('@')[2]}"
