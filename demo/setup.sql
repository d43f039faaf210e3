--
-- What an administrator types once.  :port and :key_file are the stand-in's;
-- for the real API it would be OPTIONS (region 'us').
--
CREATE EXTENSION userpilot;
SELECT format('http://127.0.0.1:%s', :'port') AS endpoint
\gset
CREATE SERVER userpilot FOREIGN DATA WRAPPER userpilot OPTIONS (endpoint :'endpoint');
CREATE USER MAPPING FOR PUBLIC SERVER userpilot OPTIONS (api_key_file :'key_file');
SELECT userpilot_enable('userpilot')
\g /dev/null
CALL userpilot_check();
