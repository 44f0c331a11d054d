"""ssr_rec trains sharded click-through-rate recommenders with an SSR over-arch (SIGIR'26), and serves them."""
