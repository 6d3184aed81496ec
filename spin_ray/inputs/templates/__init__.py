"""An optimisation that need never be opened: writes what most chat templates write without running Jinja each time.

``Skeletons.of(template, ask)`` is the only entry. Where a template does more than copy texts, ``write`` returns None
and the template is run. Time saved: benchmarks/README.md, row 8.

    copying.py     proves that a template only copies texts
    skeletons.py   asks it once for each sequence of roles
"""

from spin_ray.inputs.templates.skeletons import Skeletons

__all__ = ["Skeletons"]
