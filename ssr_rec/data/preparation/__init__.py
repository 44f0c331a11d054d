"""Preparation turns a raw click log into parquet shards and a schema, on DuckDB or Spark."""
