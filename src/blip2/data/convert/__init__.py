"""Public data sets, as they are downloaded, to shards of our format."""
