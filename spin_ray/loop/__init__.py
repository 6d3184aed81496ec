"""The method: launch, driver, algorithms, stages."""
