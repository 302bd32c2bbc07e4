"""What tests, the demo and benchmarks share: a server in a process of its own, clients that note when each token came, and a judge."""
