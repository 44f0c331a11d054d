"""ssr_rec: sharded click-through-rate recommenders with an SSR over-arch (SIGIR'26)."""
