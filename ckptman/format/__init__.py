"""Second floor: what bytes mean. Pure: no I/O, no clock, no thread. The normative text is docs/reference/format.md."""
