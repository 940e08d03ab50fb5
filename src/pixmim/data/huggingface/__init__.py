"""Images in tables: Hugging Face data sets, parquet and Arrow."""
