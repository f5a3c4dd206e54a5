"""A regular expression whose nested repeats, written out, fill the memory when it is compiled."""

from _common import adapter, limit_memory, load, reconfigure, refused

home = adapter()
reconfigure(home, target_modules="(?:(?:(?:(?:q{1000}){1000}){1000}){1000})|.*q_proj")
limit_memory()
refused(lambda: load(home), seconds=10)
