-- How many of the two tables are there, in which schema, and why nothing can be sold; else NULL.
-- From pg_class itself: to_regclass() may answer from before the wait for another process.
SELECT count(oid), min(relnamespace::regnamespace::text), CASE
    WHEN current_setting('server_encoding') <> 'UTF8' THEN format(
        'the database''s encoding is %s, this program needs UTF8',
        current_setting('server_encoding'))
    WHEN current_setting('transaction_read_only') = 'on' THEN
        'this server is read-only: a standby?'
    WHEN 'off' IN (current_setting('fsync'), current_setting('full_page_writes')) THEN
        'a crash would lose sales: set fsync and full_page_writes to on'
    WHEN max(obj_description(oid, 'pg_class')) IS DISTINCT FROM mark AND count(oid) > 0 THEN format(
        'its tables are not ours: the comment on inventory is %L, needed is %L',
        max(obj_description(oid, 'pg_class')), mark)
    WHEN NOT bool_and(has_table_privilege(oid, 'SELECT') AND has_table_privilege(
        oid, CASE relname WHEN 'inventory' THEN 'UPDATE' ELSE 'INSERT' END)) THEN
        'this role may not sell: GRANT SELECT, UPDATE ON inventory and SELECT, INSERT ON purchases'
        ' to it'
    END
FROM (SELECT 'flash sale inventory, schema 1' AS mark) AS schema_sql LEFT JOIN pg_class
    ON relname IN ('inventory', 'purchases') AND pg_table_is_visible(oid)
GROUP BY mark
