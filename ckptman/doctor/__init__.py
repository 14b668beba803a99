"""
Examining a storage: what it does is measured, and nothing is believed because of its name.

Everything happens in a folder of the examination's own, ``doctor-<16 hex digits>``, which no root has a use for: a
live writer of the root is not disturbed. Nothing stays behind; a root that did not exist does not exist afterwards.
"""
