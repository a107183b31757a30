"""HTTP server for exports, and what other servers need of it: limits, deadlines, clean shutdown."""
