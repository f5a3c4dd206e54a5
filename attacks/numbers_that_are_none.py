"""A config with NaN, which makes every output NaN, and one that says a field twice."""

from _common import CONFIG, VeneerError, adapter, load, refused

home = adapter()
honest = (home / CONFIG).read_text()


def use():
    for old, new in (('"lora_alpha": 8', '"lora_alpha": NaN'), ('"r": 4', '"r": 4, "r": 4'), ('"r": 4', '"r": 1e999')):
        assert old in honest
        (home / CONFIG).write_text(honest.replace(old, new))
        try:
            load(home)
        except VeneerError as error:
            last = error
        else:
            return
    raise last


refused(use)
