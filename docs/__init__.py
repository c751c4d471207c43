"""The site: pages, and in `shown` what draws their figures."""
