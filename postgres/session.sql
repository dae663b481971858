-- What a sale leans on, whatever the server, the database, the role, the URL and PGOPTIONS say.
-- $1 and $2: milliseconds. $3: the schema, NULL where search_path decides.
SELECT set_config(name, value, false) FROM pg_settings JOIN (VALUES
    ('lock_timeout', $1), ('statement_timeout', $2),
    ('idle_session_timeout', '0'), ('idle_in_transaction_session_timeout', '0'),
    ('transaction_timeout', '0'), -- of PostgreSQL 17: an older one has no such row in pg_settings
    ('search_path', coalesce($3, current_setting('search_path'))),
    ('client_encoding', 'UTF8'),
    -- Only a WARNING tells that the wait for a standby was cut short.
    ('client_min_messages', 'warning'),
    ('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END),
    ('default_transaction_isolation', 'read committed'),
    -- A plan that was made while the tables were empty is kept for the whole sale, so it must not be
    -- one that is good for empty tables.
    ('plan_cache_mode', 'force_generic_plan'), ('enable_seqscan', 'off'), ('jit', 'off')
) AS needed (name, value) USING (name)
