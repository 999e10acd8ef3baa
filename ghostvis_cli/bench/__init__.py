"""Measuring: workloads, load, metrics, reports. Times are seconds on the client's monotonic clock."""
