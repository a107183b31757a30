"""What leaves the house: export, quantization, runtimes, latency, sharing."""
