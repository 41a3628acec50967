"""One source of evidence a file: `read()` touches the world, `judge(reading)` is pure."""
