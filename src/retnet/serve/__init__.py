"""HTTP server: OpenAI's API, sessions whose states are kept, forked, rewound and moved, and a playground, on one engine."""
