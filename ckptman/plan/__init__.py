"""Third floor, pure: which rank writes which bytes (`save`), which bytes a restore reads (`load`), boxes for both."""
