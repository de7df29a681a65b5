"""The error curves of all weights, for allocators that compare them: a pass of its own, resumable."""

from .skeleton import Skeleton


def measure(source, config, parts):
    """Put the error curve of every weight into the session of `config`.

    Args:
        source ([`Source`]): the dense checkpoint.
        config ([`LowRankConfig`]): with a session that has the statistics.
        parts ([`Parts`]): where curves are kept.
    """
    session = config.session
    curves = session.measured.curves = {}
    session.measuring = True
    skeleton = Skeleton(source, config, "Measuring")
    for unit in skeleton.units:
        if not unit.sites:
            continue
        part = f"curves.{unit.name}"
        if part in parts:
            curves.update(parts.read(part)[0])
        else:
            # The factors of this pass are empty.
            skeleton.convert(unit)
            parts.write(part, {site: curves[site] for site in unit.sites})
    skeleton.quantizer.progress.close()
    session.measuring = False
