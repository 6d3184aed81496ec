"""An optimisation that need never be opened: writes what most chat templates write without running Jinja for each row.

``Skeletons.of(template, ask)`` is the only entry, and ``rendering.py`` its only user. Where a template cannot be shown
to copy texts as they are, ``write`` returns None and the template itself is run, as it would be without this package.

    copying.py     reads a template's syntax tree: does it copy the texts of messages and do nothing else with them?
    skeletons.py   asks such a template once for each sequence of roles, and fills in the texts by itself

Without the package, ``write`` could return None always. The time that it saves: benchmarks/README.md, row 8, measured
by ``python benchmarks/size.py``. tests/unit/inputs/test_templates.py shows that it writes the template's own bytes.
"""

from spin_ray.inputs.templates.skeletons import Skeletons

__all__ = ["Skeletons"]
