"""The comparison with other libraries, in parts: workloads, accuracy needed, tools, and the table."""
