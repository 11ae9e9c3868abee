"""Load on a running server: closed-loop scenarios (locust) and open-loop arrivals. Knows the server by HTTP alone."""
