"""Makes embedding tables: from the schema to sharded ``EmbeddingBagCollection``s."""
