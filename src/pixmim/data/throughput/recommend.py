"""From measured rates to what a person should do: a pure function of numbers."""

from pixmim.data.caching import SHARE
from pixmim.data.resized_cache import Kind
from pixmim.data.throughput.measure import MANY, Cached, Disk, Rates

FILES = 0.5
"""Share of the memory up to which files are reckoned to stay there after the first epoch, by the system's doing."""

_CLEARLY = 1.3  # times as fast: worth doing something for


def advise(rates: Rates, command: str, eats: float | None = None) -> list[str]:
    """What limits, what would help, and whether a model is fed, in a sentence or a few each.

    command  what would make a cache of these images
    eats     images a second that the model takes
    """
    lines = [_limit(rates), *_better(rates, command)]
    if eats is not None:
        lines.append(_fed(rates, eats))
    if rates.bad:
        lines.append(f"{rates.bad} of {rates.sample:,} images tried cannot be read, such as {rates.example}")
    return lines


def today(rates: Rates) -> float:
    """Images a second of training as it stands, from the second epoch on."""
    if rates.keeps:
        return rates.kept
    if rates.disk is None or rates.loader_first is None or _stays(rates, rates.disk.bytes):
        return rates.loader
    return min(rates.loader, rates.loader_first)


def _stays(rates: Rates, size: float) -> bool:
    """Whether the system can keep files of `size` bytes for all images in its memory."""
    return rates.images * size <= FILES * rates.memory


def _reach(rates: Rates, cached: Cached) -> float:
    """Images a second from a cache: as measured in memory, or as the disk gives, as far as is known, where less."""
    if _stays(rates, cached.bytes) or rates.disk is None:
        return cached.loader
    return min(cached.loader, max(rates.disk.first, rates.disk.many) * rates.disk.bytes / cached.bytes)


def _limit(rates: Rates) -> str:
    now = today(rates)
    if rates.keeps:
        size = _gb(rates.images * rates.decoded)
        return f"Training keeps these images decoded in memory, {size}: {now:,.0f} images/s after the first epoch."
    if rates.disk is not None and now < rates.loader / _CLEARLY:
        return _disk_limits(rates, rates.disk)
    text = (
        f"The cores limit, at {now:,.0f} images/s: on one thread an image takes {_ms(rates.decode)} to read and "
        f"decode, and {_ms(rates.crop)} to crop."
    )
    if rates.threads < rates.cores:
        text += f" {rates.threads} threads leave cores idle: this machine has {rates.cores}."
    elif rates.threads > 1 and rates.decode_all < rates.threads * rates.decode / 2:
        work = rates.decode_all / rates.decode
        text += f" {rates.threads} threads decode {work:.1f} times what one does: is something else running?"
    if rates.loader_first is not None and rates.loader_first < now / _CLEARLY:
        text += f" The first epoch, from the disk, runs at {rates.loader_first:,.0f}."
    return text


def _disk_limits(rates: Rates, disk: Disk) -> str:
    few, many = rates.threads, MANY * rates.threads
    text = (
        f"The disk limits: {today(rates):,.0f} images/s come from it, where the cores would do {rates.loader:,.0f}, "
        f"and {_gb(rates.images * disk.bytes)} do not stay in memory."
    )
    if disk.many > _CLEARLY * disk.first:
        return f"{text} It gives more to more readers: try --threads {many}."
    got = f"{few} get {disk.first:,.0f} images/s out of it, {many} get {disk.many:,.0f}"
    return f"{text} More threads do not help: {got}."


def _better(rates: Rates, command: str) -> list[str]:
    """What caches would change."""
    lines, best = [], today(rates)
    fits = rates.images * rates.decoded <= SHARE * rates.memory
    ways: dict[Kind, str] = {"jpeg": command, "raw": f"{command} --raw"}
    for kind, way in ways.items():
        cached = rates.caches.get(kind)
        if cached is None or _reach(rates, cached) < _CLEARLY * best:
            continue
        reach = _reach(rates, cached)
        text = (
            f"`{way}` would give {reach:,.0f} images/s, {reach / best:.1f} times as many (tried with some of these "
            f"images, in memory). It takes {_duration(rates.images / cached.made)} to make, and "
            f"{_gb(rates.images * cached.bytes)}."
        )
        if reach < cached.loader:
            text += f" The disk limits it: the cores would do {cached.loader:,.0f}."
        best = reach
        if fits and rates.kept > _CLEARLY * reach:
            text += f" All of it fits into memory decoded, where it stays by itself: {rates.kept:,.0f} images/s."
            best = rates.kept
        lines.append(text)
    return lines or ["Nothing that was tried here would be clearly faster."]


def _fed(rates: Rates, eats: float) -> str:
    now = today(rates)
    if now >= eats:
        return f"A model that eats {eats:,.0f} images/s is fed."
    reach = {kind: _reach(rates, cached) for kind, cached in rates.caches.items()}
    if reach.get("jpeg", 0.0) >= eats:
        more = "a cache would feed it"
    elif reach and rates.images * rates.decoded <= SHARE * rates.memory and rates.kept >= eats:
        more = "a cache would feed it, kept decoded in memory"
    elif reach.get("raw", 0.0) >= eats:
        more = "a raw cache would feed it"
    else:
        more = "nothing that was tried here feeds it"
    return f"A model that eats {eats:,.0f} images/s waits {1 - now / eats:.0%} of its time; {more}."


def _ms(rate: float) -> str:
    return f"{1e3 / rate:.1f} ms"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds > 5400
        else f"{seconds / 60:.0f} min"
        if seconds > 90
        else f"{max(1, seconds):.0f} s"
    )
