"""The method, from top to bottom: launch, driver, algorithms, stages."""
