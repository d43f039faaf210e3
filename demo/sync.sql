--
-- Everything there is, through the triggers' own mapping: what Userpilot has
-- already is left out
--
\echo 'SELECT * FROM userpilot_sync_table(''companies'');'
SELECT * FROM userpilot_sync_table('companies');

\echo 'SELECT * FROM userpilot_sync_table(''users'');'
SELECT * FROM userpilot_sync_table('users');
