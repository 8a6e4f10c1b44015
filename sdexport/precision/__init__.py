"""Half precision: rewriting graphs, and auditing which nodes must stay in float32."""
