"""A regular expression that would match for longer than anybody waits."""

from _common import adapter, load, reconfigure, refused

home = adapter()
reconfigure(home, target_modules="".join(f"(?P<{n}>.*)" for n in "abcdefghij") + "(?P=a)(?P=b)(?P=c)(?P=d)(?<=zz)")
refused(lambda: load(home), seconds=60)
