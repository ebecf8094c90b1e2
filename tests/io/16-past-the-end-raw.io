$ create -q -f raw disk 4M
@ -f raw disk
read 4M 1
write 4M 512
read 100M 1
length
