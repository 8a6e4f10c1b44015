"""Half precision: what is written, and what must stay in float32."""
