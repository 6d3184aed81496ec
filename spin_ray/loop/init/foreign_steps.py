"""Numbers of a foreign config that depend on the rows: batches of packs, and steps."""

from math import ceil

from spin_ray.loop.init.foreign import Foreign
from spin_ray.loop.init.look import Look
from spin_ray.loop.init.settings import Setting, Settings


def by_rows(found: Foreign, settings: Settings, seen: Look) -> Settings:
    """Returns the settings with packs counted in rows, and steps in epochs and fractions, if rows were seen."""
    place = found.batch_place
    lengths = [length for each in seen.train for length in each.lengths]
    if place not in settings or not seen.rows or not lengths:
        return settings
    settings = dict(settings)
    longest = settings["model.max_length"].value if "model.max_length" in settings else None
    if found.packs and longest is not None:
        each = max(1.0, longest * len(lengths) / sum(min(length, longest) for length in lengths))
        batch, why = settings[place]
        settings[place] = Setting(
            round(batch * each), f"{batch} packs of {longest} tokens ({why}), {each:.1f} rows each"
        )
    return settings | _steps(found, settings, ceil(seen.rows / settings[place].value))


def _steps(found: Foreign, settings: Settings, in_a_pass: int) -> Settings:
    epochs, changed = f"{found.stage}.epochs", Settings()
    if steps := found.max_steps:
        passes = steps / in_a_pass
        changed[epochs] = Setting(
            max(1, round(passes)), f"{steps} steps of {in_a_pass} a pass: {found.why('max_steps')}"
        )
        found.leave("max_steps", f"is {passes:.2g} passes over the rows; whole ones only: {changed[epochs].value}")
    return changed | _warm_up(found, in_a_pass * (settings | changed)[epochs].value)


def _warm_up(found: Foreign, steps: int) -> Settings:
    place, most = f"{found.stage}.optimizer.warmup_fraction", found.fact("most_warmup_steps")
    if found.fact("schedule") == "constant":
        return {}
    if (count := found.warmup_steps) >= 1:
        found.left.pop(found.given["warmup_steps"][0], None)
        why = f"{count:g} of {steps:,} steps: {found.why('warmup_steps')}"
    elif most and found.given.keys().isdisjoint(("warmup_steps", "warmup_fraction")):
        count = min(most, found.fact("warmup_fraction") * steps)
        why = f"{count:.4g} of {steps:,} steps, at most {most}: {found.why('warmup_fraction')}"
    else:
        return {}
    return {place: Setting(float(f"{min(1.0, count / steps):.4g}"), why)}
