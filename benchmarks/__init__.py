"""Programs that measure this project. Results go to docs/measurements.md, with the machine and the spread."""
